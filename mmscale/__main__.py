"""``python -m mmscale``, and ``torchrun -m mmscale train CONFIG``: the command ``mmscale``."""

from mmscale.cli.main import entry

if __name__ == "__main__":
    entry()
