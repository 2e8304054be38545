"""The contract between gateware, compiler, simulation and runtime: sizes, instructions, registers,
integer arithmetic, memory layout and the program file. Standard library and numpy only."""
