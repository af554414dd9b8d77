"""What happens before the first step: inputs, first screen, references, memory and FLOP estimates, self-check."""
