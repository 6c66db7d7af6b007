"""`python -m diffalign` is the command `diffalign`, for accelerate and torchrun."""

from diffalign.cli import main

main()
