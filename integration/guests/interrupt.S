# An interrupt through the 8259A wakes the processor; the handler reports its vector.
        .code16
        .include "report.inc"
start:  cli
        xor     %ax, %ax
        mov     %ax, %ds
        mov     %ax, %ss
        mov     $0x8000, %sp
        movw    $handler, 4 * 0x24
        movw    $0, 4 * 0x24 + 2
        movw    $slave, 4 * 0x2a
        movw    $0, 4 * 0x2a + 2
        mov     $0x11, %al              # ICW1 to ICW4, both chips
        outb    %al, $0x20
        outb    %al, $0xa0
        mov     $0x20, %al
        outb    %al, $0x21
        mov     $0x28, %al
        outb    %al, $0xa1
        mov     $4, %al
        outb    %al, $0x21
        mov     $2, %al
        outb    %al, $0xa1
        mov     $1, %al
        outb    %al, $0x21
        outb    %al, $0xa1
        mov     $0xeb, %al              # IRQ 4 and the cascade
        outb    %al, $0x21
        mov     $0xfb, %al              # IRQ 10
        outb    %al, $0xa1
        mov     $1, %al
        report_al                       # ready
        xor     %bx, %bx
again:  sti
        hlt
        cli
        cmp     $3, %bx
        jb      again
        done

handler:
        inc     %bx
        mov     $0x24, %al
        report_al
        mov     $0x20, %al
        outb    %al, $0x20
        iret

slave:  inc     %bx
        mov     $0x2a, %al
        report_al
        mov     $0x20, %al
        outb    %al, $0xa0
        outb    %al, $0x20
        iret
