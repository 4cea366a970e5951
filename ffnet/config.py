"""The configuration of a run as frozen dataclasses, and the names of its files. `ffnet.options` builds it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ffnet.system.errors import UserError
from ffnet.variants import DEFAULT_MODEL

# In --output-dir, for one model.
RESULT_FILE, REPORT, COMPARISON_TABLE = "result.json", "report.html", "comparison.csv"
RESULT_FILES = (
    RESULT_FILE,
    REPORT,
    "per_class.csv",
    "per_image.csv",
    "recovery.csv",
    "sensitivity.csv",
    "layers.csv",
)
PROGRESS_FOLDER = "progress"  # beside RESULT_FILES; holds what --resume needs
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

LIST_CHIPS = "list"  # in place of a chip: print the table of chips
ONE_SPLIT = "kitti"  # layout whose only part stands for every split
VALUE_RANGES = ("normalized", "0-1", "0-255")  # ranges of the values that an ONNX file takes
CHANNEL_ORDERS = ("rgb", "bgr")
ADAROUND_ITERATIONS = 500  # per layer
SEQ_MSE_BITS = 4  # AIMET's sequential MSE searches the ranges of weights with at most this many bits
OUTPUT_FOLDERS = ("output_dir", "save_predictions", "export")  # fields of OutputConfig


@dataclass(frozen=True)
class ModelConfig:
    """Which networks are evaluated."""

    names: tuple[str, ...] = (DEFAULT_MODEL,)  # keys of VARIANTS; not used with `onnx`
    checkpoint: Path | None = None  # file or folder of files; None: the published file, or the demo's
    onnx: Path | None = None  # evaluate this ONNX file instead of a checkpoint
    onnx_input: str | None = None  # one of VALUE_RANGES; None: detect it
    onnx_channels: str | None = None  # one of CHANNEL_ORDERS; None: detect it
    cache_dir: Path | None = None  # for downloads and rendered scenes; None: torch hub's folder

    @property
    def name(self) -> str:
        """The only model; raises a ValueError if there are several."""
        (name,) = self.names
        return name


@dataclass(frozen=True)
class DataConfig:
    """Which images are scored and which are used for calibration."""

    demo: bool = False  # render the demo's street scenes instead of reading `dataset_path`
    dataset: str = "cityscapes"  # name of the layout of `dataset_path`, and a variant of Cityscapes after a colon
    dataset_path: Path | None = None  # folder that holds the data set
    classes: Path | None = None  # file of a label set; None: that of the layout
    input_size: tuple[int, int] | None = None  # height and width to which images are resized; None: their own
    split: str = "val"  # split that is scored
    limit: int | None = None  # score only the first `limit` images; None: all
    calibration_split: str = "val"
    calibration_images: int | None = None  # number of images drawn for calibration; None: all
    seed: int = 0  # seed of that draw
    selection_images: int | None = None  # number of images for the choice of recovery steps; None: see run.inputs

    @property
    def is_cityscapes(self) -> bool:
        """Whether the images and classes are those of Cityscapes, so that published metrics may be comparable."""
        return not self.demo and self.dataset == "cityscapes" and self.classes is None

    @property
    def scores_calibration_images(self) -> bool:
        """Whether calibration images are taken from those that can be scored."""
        return self.calibration_split == self.split or self.dataset == ONE_SPLIT


@dataclass(frozen=True)
class QuantizationConfig:
    """How the network is quantized; the defaults are the published configuration."""

    param_bw: int = 8  # bits of weights
    output_bw: int = 8  # bits of activations
    quant_scheme: str = "tf_enhanced"  # AIMET's name of the scheme that chooses ranges
    config_file: str = "default"  # AIMET's per-channel default, an alias that AIMET knows, or a path
    cle: bool = True  # cross-layer equalization
    encodings: Path | None = None  # AIMET encodings that are loaded instead of calibrating
    partial_encodings: bool = False  # calibrate the quantizers that `encodings` does not cover
    seq_mse: bool = False  # choose the ranges of 4-bit weights by sequential MSE
    adaround: int | None = None  # iterations per layer of adaptive rounding; None: round weights to nearest
    max_drop: float | None = None  # take recovery steps until the mIoU drop is within this many percentage points
    recovery_images: int = 16  # number of calibration images for sequential MSE and adaptive rounding

    def __post_init__(self) -> None:
        """Check the values that are given in Python; the program's are checked as options."""
        in_range = 4 <= self.param_bw <= 32 and 4 <= self.output_bw <= 32  # AIMET's
        if not in_range or self.quant_scheme not in ("tf_enhanced", "tf"):
            raise UserError(f"{self}: param_bw and output_bw must be 4 to 32, quant_scheme 'tf_enhanced' or 'tf'.")

    @property
    def calibrates(self) -> bool:
        """Whether some encodings are found by calibration."""
        return self.encodings is None or self.partial_encodings

    @property
    def recovers(self) -> bool:
        """Whether any step of accuracy recovery is requested."""
        return self.seq_mse or self.adaround is not None or self.max_drop is not None


@dataclass(frozen=True)
class NpuConfig:
    """The evaluation on Qualcomm's NPU."""

    chips: tuple[str, ...] = ()  # keys of CHIPS, or LIST_CHIPS; empty: no evaluation on the NPU
    images: int | Literal["all"] = 50  # number of images, every n-th of the scored ones
    fallback: bool = False  # nodes that the NPU refuses may run on the CPU


@dataclass(frozen=True)
class Runtime:
    """Where networks run, and how images are loaded."""

    device: str = "cpu"  # torch's name of the device; the program sets it from Config.use_cuda
    allow_tf32: bool = False  # on a GPU, compute FP32 in TF32
    compile: bool | None = None  # compile the networks; None: on a CPU, if the run is long enough
    batch_size: int = 8
    num_workers: int | None = None  # threads that decode images; 0: the main thread; None: see evaluation.loading
    quiet: bool = False  # no progress on stderr

    def __post_init__(self) -> None:
        """Check the values that are given in Python; the program's are checked as options."""
        object.__setattr__(self, "device", str(self.device))  # it may be a torch.device
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device) or self.batch_size < 1 or (self.num_workers or 0) < 0:
            raise UserError(f"{self}: device must be cpu or cuda, batch_size at least 1 and num_workers at least 0.")

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device != "cpu"


@dataclass(frozen=True)
class OutputConfig:
    """Which results are computed beyond mIoU, and where they are written."""

    output_dir: Path | None = None
    resume: bool = False  # continue with what an earlier run saved in `output_dir`
    worst: int = 6  # number of images with the largest mIoU drop that the report shows
    layers: int = 2  # number of images on which all layers are compared; 0: none
    sensitivity: bool = False
    sensitivity_images: int = 8
    save_predictions: Path | None = None
    export: Path | None = None
    execute: bool = False  # add the ONNX Runtime backend
    force: bool = False  # write into folders that hold other files
    fail_under: float | None = None  # largest mIoU drop, in percentage points, with exit status 0
    baseline: Path | None = None  # output folder of an earlier run to compare with


@dataclass(frozen=True)
class Config:
    """The configuration of one run of the program."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    npu: NpuConfig = field(default_factory=NpuConfig)
    runtime: Runtime = field(default_factory=Runtime)
    output: OutputConfig = field(default_factory=OutputConfig)
    use_cuda: bool | None = None  # None: if a CUDA device is available
    input_sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # model -> size, without data.input_size
    calibrates_onnx: bool = False  # quantize the ONNX file with aimet-onnx
    asked_bits: tuple[str, ...] = ()  # options that name bit widths beside encodings of an ONNX file
    list_models: bool = False  # print the table of models and do nothing else
    command: str = ""  # command line that repeats the run

    @property
    def quantizes_onnx(self) -> bool:
        """Whether an ONNX file is evaluated beside its quantized form."""
        return bool(self.model.onnx and (self.quantization.encodings or self.calibrates_onnx))

    @property
    def needs_calibration_images(self) -> bool:
        """Whether calibration images are read."""
        needed = self.quantization.calibrates or self.output.sensitivity
        return needed and (not self.model.onnx or self.calibrates_onnx)

    @property
    def lists(self) -> bool:
        """Whether the run only prints a table."""
        return self.list_models or LIST_CHIPS in self.npu.chips

    def for_model(self, name: str) -> "Config":
        """Return the configuration of one model; if there are several, each has a subfolder of every folder."""
        if len(self.model.names) == 1:
            return self
        folders = {field: getattr(self.output, field) for field in (*OUTPUT_FOLDERS, "baseline")}
        own = {field: folder / name for field, folder in folders.items() if folder}
        return replace(
            self,
            model=replace(self.model, names=(name,)),
            data=replace(self.data, input_size=self.data.input_size or self.input_sizes.get(name)),
            output=replace(self.output, **own),
        )
