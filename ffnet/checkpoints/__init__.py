"""Read checkpoint files without running anything that they contain.

`loading` reads every published form and returns a network with its weights. `unpickling` reads what torch.save wrote
with torch's restricted unpickler, once `pickle_checks` has accepted it. `matching` compares a state_dict with a
variant, `folder` finds the checkpoint of each of several models in a folder, `download` fetches the published files,
and `problems` holds what can be wrong with a file.
`python -m ffnet.checkpoints FILE` says what a file is.
"""
