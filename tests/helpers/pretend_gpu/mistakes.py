"""Mistakes that only a GPU shows, to be planted in the program."""

import inspect
import textwrap
from dataclasses import dataclass

from ffnet.evaluation.devices import moved
from ffnet.evaluation.loop import _launch
from ffnet.quantization.lowering import _plain_layer
from ffnet.run.scoring import measure_sensitivity
from ffnet.run.session import _save


@dataclass(frozen=True)
class Mistake:
    """A function in whose source one piece of text is replaced."""

    function: object
    correct: str
    mistaken: str
    options: tuple[str, ...] = ()  # options that the program needs to call the function

    def plant(self):
        """Change the function for the rest of the process, wherever it was imported to."""
        function = inspect.unwrap(self.function)
        source = textwrap.dedent(inspect.getsource(function))
        assert source.count(self.correct) == 1, f"{function.__name__} has changed: {self.correct}"
        namespace = dict(function.__globals__)
        exec(source.replace(self.correct, self.mistaken), namespace)
        function.__code__ = inspect.unwrap(namespace[function.__name__]).__code__


MISTAKES = {
    "labels are left on the CPU": Mistake(
        moved, "(tensor.to(device, non_blocking=True) for tensor in batch)", "(batch[0].to(device), batch[1])"
    ),
    "the lowered network's weights are on the CPU": Mistake(_plain_layer, ".clone()", ".clone().cpu()"),
    "counts are read on the device": Mistake(_launch, "_to_host(agreeing)", "agreeing"),
    "predictions are written from the device": Mistake(_save, "ids[position].cpu().numpy()", "ids[position].numpy()"),
    "ONNX Runtime's logits are scored on the CPU": Mistake(
        _launch, "logits = logits.to(device)", "pass", options=("--execute",)
    ),
    "images for the sensitivity are on the CPU": Mistake(
        measure_sensitivity, "[None].to(run.runtime.device))", "[None])"
    ),
}
