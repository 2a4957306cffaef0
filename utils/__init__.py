"""What the scripts share; each module has one reason to exist, named in its first line."""
