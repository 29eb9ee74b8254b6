"""System-call policies: text to AST to BPF, simulated and linted; imports no other package of ours."""
