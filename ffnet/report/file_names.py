"""Names of the files and folders that a run writes into `--output-dir`. Needs no torch."""

RESULT_FILE, REPORT, COMPARISON_TABLE = "result.json", "report.html", "comparison.csv"
RESULT_FILES = (  # of one model
    RESULT_FILE,
    REPORT,
    "per_class.csv",
    "per_image.csv",
    "recovery.csv",
    "sensitivity.csv",
    "npu_layers.csv",
)
COMPARISON_FILES = (REPORT, COMPARISON_TABLE)  # of several models, beside a folder for each
RESULT_MEGABYTES = 30  # upper bound of the size of one model's results and of its PROGRESS_FOLDER
PROGRESS_FOLDER = "progress"  # beside RESULT_FILES; what --resume goes on with
