"""File names, opset and bit widths of an export. Importing this module imports neither torch nor onnx."""

from ffnet.system.errors import UserError

MODEL_FILE = "model.onnx"  # with QuantizeLinear and DequantizeLinear nodes
FLOAT_MODEL_FILE = "model_fp32.onnx"
ENCODINGS_FILE = "model.encodings"
MANIFEST_FILE = "manifest.json"
ROUNDED_LAYERS = "rounded_layers"  # key of the manifest: layers whose weights in FLOAT_MODEL_FILE AdaRound rounded
EXPORT_FILES = (MODEL_FILE, FLOAT_MODEL_FILE, ENCODINGS_FILE, MANIFEST_FILE)
NPU_FOLDER = "npu"  # of an export; holds a folder with CONTEXT_FILE and its binary for each chip
CONTEXT_FILE = "model_ctx.onnx"  # the network as compiled for a chip
OPSET = 21  # the first with 4-bit and 16-bit QuantizeLinear
PARAM_BIT_WIDTHS, OUTPUT_BIT_WIDTHS = (4, 8, 16), (8, 16)  # of which ONNX has integers and ONNX Runtime kernels


EXPORT_REMEDY = "remove --export, --execute and --npu (with --demo: add --no-execute)"


def check_bit_widths(param_bw: int, output_bw: int, remedy: str = EXPORT_REMEDY) -> None:
    """Raise a UserError unless ONNX Runtime can run weights and activations of these bit widths.

    `remedy` says what else the user can do than choose other bit widths.
    """
    for what, bits, supported in (("param", param_bw, PARAM_BIT_WIDTHS), ("output", output_bw, OUTPUT_BIT_WIDTHS)):
        if bits not in supported:
            raise UserError(
                f"--default-{what}-bw: {bits} bits are not among the bit widths of ONNX Runtime's kernels "
                f"({', '.join(map(str, supported))}). Use one of these, or {remedy}."
            )
    if param_bw == output_bw == 16:
        raise UserError(
            "--default-param-bw and --default-output-bw: ONNX Runtime's int32 biases overflow if both are 16 bits. Use "
            "8 for one of them."
        )
