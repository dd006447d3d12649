"""`python -m higgstune`: the same as the command, for torchrun."""

from higgstune.cli.main import main

main()
