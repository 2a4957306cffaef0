"""What every script needs and none is about: errors, command line, files, tables, processes, devices."""
