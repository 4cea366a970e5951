"""Read checkpoint files without running anything that they contain.

`loading` reads every published form and returns a network with its weights. `unpickling` reads what torch.save wrote
with torch's restricted unpickler, `matching` compares a state_dict with a variant, and `download` fetches the published
files. `python -m ffnet.checkpoints FILE` says what a file is.
"""
