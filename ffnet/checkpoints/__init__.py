"""Read checkpoint files without running anything that they contain.

`loading` reads every published form, loads it into a network, and finds the checkpoints of several models in a folder.
`unpickling` reads what torch.save wrote, with stubs in place of classes and functions, `matching` compares a state_dict
with a variant, and `download` fetches the published files. `python -m ffnet.checkpoints FILE` describes a file.
"""
