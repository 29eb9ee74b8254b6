# Never leaves by itself.
        .code16
        .include "report.inc"
start:  mov     $1, %al
        report_al
here:   jmp     here
