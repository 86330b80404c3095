"""Classification of hyperspectral scenes (`research.data.scenes`)."""
