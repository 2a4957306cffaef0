"""Images in memory: data sets, splits, augmentation, the loader."""
