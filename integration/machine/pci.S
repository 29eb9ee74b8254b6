# Writes the host bridge's command register for ever.
        .include "pc.inc"
start:  say     "ready"
1:      mov     $0xcf8, %dx
        mov     $0x80000004, %eax
        outl    %eax, %dx
        mov     $0xcfc, %dx
        xor     %eax, %eax
        outw    %ax, %dx
        jmp     1b
