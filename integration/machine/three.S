# Two processors read the clock's seconds for ever; the third sends back what the console receives.
        .include "pc.inc"
        .set X2APIC_ICR, 0x830
        .set AP, 0x3000
        .set COUNT, 0x4000
start:  say     "ready"
        mov     $0x1b, %ecx             # IA32_APIC_BASE: x2APIC mode, so that no page needs mapping
        rdmsr
        or      $0xc00, %eax
        wrmsr
        lea     ap(%rip), %rsi
        mov     $AP, %edi
        mov     $ap_end - ap, %ecx
        rep movsb
        movb    $0, COUNT
        xor     %edx, %edx
        mov     $0xc4500, %eax          # INIT to all but this one
        mov     $X2APIC_ICR, %ecx
        wrmsr
        mov     $0xc4600 + (AP >> 12), %eax
        wrmsr
1:      xor     %eax, %eax
        outb    %al, $0x70
        inb     $0x71, %al
        jmp     1b

        .code16
ap:     xor     %ax, %ax
        mov     %ax, %ds
        mov     $1, %al
        lock xaddb %al, COUNT
        test    %al, %al
        jnz     2f
1:      xor     %ax, %ax
        outb    %al, $0x70
        inb     $0x71, %al
        jmp     1b
2:      mov     $LSR, %dx
        inb     %dx, %al
        testb   $1, %al
        jz      2b
        mov     $COM1, %dx
        inb     %dx, %al
        outb    %al, %dx
        jmp     2b
ap_end:
