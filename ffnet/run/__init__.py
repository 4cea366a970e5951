"""The list of stages. This package alone knows resumption and ranks, and imports the data sets."""
