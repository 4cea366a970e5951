"""Quantize a network with AIMET: simulate, calibrate, load encodings, and measure how sensitive each quantizer is.

Modules in reading order:

quantsim        equalize a network, simulate its quantization and calibrate the simulation
tf_enhanced     faster collection of TF-Enhanced calibration statistics
sites           where each quantizer sits
bias_ranges     raise weight scales so that biases fit into int32
lowering        convert a simulation into plain torch modules
encodings_file  parse AIMET's encodings files
tensor_names    match the names in these files with quantizer sites
encodings       load encodings into a simulation
sensitivity     rank quantizers by their effect on the logits
"""
