"""What a training step needs of a chip and costs on it, before one is rented.

`python -m frugax.plan --config=configs/llama.py:size=7b --topology=v5e:4x4`
compiles the step of a run for chips that are only described, with the compiler
that these chips have, and reads the program: `environment` and `topologies`
find the compiler, `compile` runs it, `buffers` and `hlo` read what it says,
`cost` estimates the time, `search` and `compare` try several configs, `table`
prints. Nothing is allocated and nothing runs.
"""
