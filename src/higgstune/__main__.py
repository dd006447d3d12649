"""`python -m higgstune`: the same as the command, for torchrun."""

from higgstune.cli import main

main()
