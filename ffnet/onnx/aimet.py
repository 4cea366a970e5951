"""Quantize a float ONNX file with aimet-onnx, an optional package."""

import warnings
from pathlib import Path

from ffnet.config import ENCODINGS_FILE, FLOAT_MODEL_FILE, QuantizationConfig
from ffnet.evaluation.loading import Images, normalize
from ffnet.onnx.reading import read_onnx
from ffnet.onnx.runtime import OnnxBackend
from ffnet.quantization.quantsim import quiet_aimet
from ffnet.system.errors import UserError


def quantize_with_aimet(backend: OnnxBackend, images: Images, config: QuantizationConfig, folder: Path) -> Path:
    """Quantize a float file as `config` says, and return the folder with the float network and its encodings.

    The network is changed by cross-layer equalization, which also folds its batch norms.

    Raises:
        UserError: If aimet-onnx can't quantize the file.
    """
    import aimet_onnx
    from aimet_onnx.common.quantsim_config.utils import get_path_for_per_channel_config
    from aimet_onnx.cross_layer_equalization import equalize_model

    proto, header = read_onnx(backend.path), backend.header
    batches = (backend.prepare(normalize(images[index][0][None])).numpy() for index in range(len(images)))
    own = get_path_for_per_channel_config() if config.config_file == "default" else config.config_file
    try:
        with quiet_aimet():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            if config.cle:
                equalize_model(proto)
            sim = aimet_onnx.QuantizationSimModel(
                proto,
                param_type=f"int{config.param_bw}",
                activation_type=f"int{config.output_bw}",
                quant_scheme=config.quant_scheme,
                config_file=own,
            )
            sim.compute_encodings({header.input_name: header.encode(batch)} for batch in batches)
            sim.export(str(folder), Path(FLOAT_MODEL_FILE).stem, encoding_version="1.0.0")
    except Exception as error:  # aimet-onnx's exceptions share no base class
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{backend.path}: aimet-onnx {aimet_onnx.__version__} can't quantize this file ({reason}). "
                        "Quantize it with another tool, and give --encodings.") from error  # fmt: skip
    (folder / FLOAT_MODEL_FILE).with_suffix(".encodings").rename(folder / ENCODINGS_FILE)
    return folder
