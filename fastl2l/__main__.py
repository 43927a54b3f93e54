"""python -m fastl2l, which torchrun takes: torchrun --nproc-per-node 2 -m fastl2l train."""

from fastl2l.cli import main

main()
