def load(data_dir):
    raise NotImplementedError
