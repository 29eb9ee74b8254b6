# A fault whose handler faults, and that one's too.
        .code16
        .include "report.inc"
start:  lidt    none
        lgdt    table
        mov     %cr0, %eax
        or      $1, %al
        mov     %eax, %cr0              # protected mode: the interrupt table has no room for any gate
        ud2
none:   .word   0
        .long   0
table:  .word   0
        .long   0
