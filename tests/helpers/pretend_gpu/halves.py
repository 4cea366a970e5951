"""How AIMET rounds halves on a GPU: `TRITON_INTERPRET=1 python -m tests.helpers.pretend_gpu.halves GUARD`.

AIMET takes its Triton kernels, which Triton's interpreter runs on the pretended GPU. Prints how many weights at halves
of a step AIMET and the program's simulation round otherwise than torch.round, as JSON.
"""

import json
import sys

import torch

from tests.helpers.pretend_gpu.device import pretend_gpu


def main(guard):
    with pretend_gpu(guard):
        import aimet_torch.quantization as aimet  # asks for a GPU when it is imported

        from ffnet.config import QuantizationConfig
        from ffnet.quantization.quantsim import build_quantsim, equalize
        from tests.helpers.networks import three_layer_network

        halves = (torch.arange(-40, 40) + 0.5).reshape(8, 10)
        scale, offset = torch.ones(8, 1), torch.zeros(8, 1)

        def differing():
            found = aimet.affine.quantize_dequantize(*(x.cuda() for x in (halves, scale, offset)), -128, 127).cpu()
            return int((found != halves.round()).sum())

        by_aimet = differing()
        build_quantsim(equalize(three_layer_network().cuda()), QuantizationConfig())
        print(json.dumps({"AIMET": by_aimet, "the program": differing()}))


if __name__ == "__main__":
    main(sys.argv[1])
