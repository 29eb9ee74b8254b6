# Without an interrupt chip in the kernel HLT is the supervisor's.
        .code16
        .include "report.inc"
start:  hlt
        done
