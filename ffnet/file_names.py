"""Names of the files and folders that the program writes."""

# In --output-dir, for one model.
RESULT_FILE, REPORT, COMPARISON_TABLE = "result.json", "report.html", "comparison.csv"
RESULT_FILES = (
    RESULT_FILE,
    REPORT,
    "per_class.csv",
    "per_image.csv",
    "recovery.csv",
    "sensitivity.csv",
    "npu_layers.csv",
)
PROGRESS_FOLDER = "progress"  # beside RESULT_FILES; holds what --resume needs
RESULT_MEGABYTES = 30  # upper bound of the size of RESULT_FILES and PROGRESS_FOLDER together
# In --output-dir, for several models, beside a folder for each.
COMPARISON_FILES = (REPORT, COMPARISON_TABLE)

# In --export.
MODEL_FILE = "model.onnx"  # with QuantizeLinear and DequantizeLinear nodes
FLOAT_MODEL_FILE = "model_fp32.onnx"
ENCODINGS_FILE = "model.encodings"
MANIFEST_FILE = "manifest.json"
EXPORT_FILES = (MODEL_FILE, FLOAT_MODEL_FILE, ENCODINGS_FILE, MANIFEST_FILE)
ROUNDED_LAYERS = "rounded_layers"  # key of the manifest: layers whose weights in FLOAT_MODEL_FILE AdaRound rounded
NPU_FOLDER = "npu"  # holds a folder with CONTEXT_FILE and its binary for each chip
CONTEXT_FILE = "model_ctx.onnx"  # the network as compiled for a chip
