"""The environments, one file each; `textrl.registration` has the table of their ids."""

if __name__ == "envs":
    raise ImportError("import this package as textrl.envs")
