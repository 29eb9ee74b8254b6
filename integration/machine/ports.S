# Reads and writes every port in 1, 2 and 4 bytes, and is still there.
        .include "pc.inc"
start:  say     "ready"
        xor     %r12d, %r12d
1:      mov     %r12d, %edx
        inb     %dx, %al
        inw     %dx, %ax
        inl     %dx, %eax
        xor     %eax, %eax
        outb    %al, %dx
        outw    %ax, %dx
        outl    %eax, %dx
        inc     %r12d
        cmp     $0x10000, %r12d
        jne     1b
        mov     $0x3fb, %dx             # the sweep has left DLAB and the modem control as it fell
        mov     $0x03, %al
        outb    %al, %dx
        say     "still here"
        poweroff
