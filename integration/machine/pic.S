# Takes five ticks of the PIT through the PIC, as an ExtINT, and says so.
        .include "pc.inc"
        .set IDT, 0x10000
        .set VECTOR, 0x20
start:  say     "ready"
        lea     tick(%rip), %rax        # a 64-bit interrupt gate for the boot code segment
        mov     $IDT + 16 * VECTOR, %edi
        movw    %ax, (%rdi)
        movw    $0x10, 2(%rdi)
        movw    $0x8e00, 4(%rdi)
        movw    $0, 8(%rdi)
        shr     $16, %rax
        movw    %ax, 6(%rdi)
        movl    $0, 8(%rdi)
        lidt    idtr(%rip)
        mov     $0x11, %al              # ICW1 to ICW4 of both PICs
        outb    %al, $0x20
        outb    %al, $0xa0
        mov     $VECTOR, %al
        outb    %al, $0x21
        mov     $VECTOR + 8, %al
        outb    %al, $0xa1
        mov     $4, %al
        outb    %al, $0x21
        mov     $2, %al
        outb    %al, $0xa1
        mov     $1, %al
        outb    %al, $0x21
        outb    %al, $0xa1
        mov     $0xfe, %al              # only IRQ 0
        outb    %al, $0x21
        mov     $0xff, %al
        outb    %al, $0xa1
        mov     $0x34, %al              # counter 0, mode 2, 100 Hz
        outb    %al, $0x43
        mov     $0x9c, %al
        outb    %al, $0x40
        mov     $0x2e, %al
        outb    %al, $0x40
        xor     %r12d, %r12d
        sti
1:      hlt
        cmp     $5, %r12d
        jb      1b
        cli
        say     "five ticks"
        poweroff

tick:   push    %rax
        inc     %r12d
        mov     $0x20, %al              # end of interrupt
        outb    %al, $0x20
        pop     %rax
        iretq

idtr:   .word   16 * 256 - 1
        .quad   IDT
