# The 8254 in the kernel ticks through the 8259A.
        .code16
        .include "report.inc"
start:  cli
        xor     %ax, %ax
        mov     %ax, %ds
        mov     %ax, %ss
        mov     $0x8000, %sp
        movw    $tick, 4 * 0x20
        movw    $0, 4 * 0x20 + 2
        mov     $0x11, %al
        outb    %al, $0x20
        mov     $0x20, %al
        outb    %al, $0x21
        mov     $4, %al
        outb    %al, $0x21
        mov     $1, %al
        outb    %al, $0x21
        mov     $0xfe, %al
        outb    %al, $0x21
        mov     $0x34, %al              # counter 0, rate generator
        outb    %al, $0x43
        mov     $0x2e, %al              # 0x122e periods of 838 ns: 3.9 ms
        outb    %al, $0x40
        mov     $0x12, %al
        outb    %al, $0x40
        xor     %bx, %bx
again:  sti
        hlt
        cli
        cmp     $3, %bx
        jb      again
        done
tick:   inc     %bx
        mov     %bl, %al
        report_al
        mov     $0x20, %al
        outb    %al, $0x20
        iret
