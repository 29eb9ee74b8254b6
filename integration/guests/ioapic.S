# The supervisor's I/O APIC: pin 4 is an edge with vector 0x44, pin 10 a level with vector 0x4a.
        .code64
        .include "report.inc"
        .set IDT, 0x5000
        .set HIGH_PD, 0x6000
        .set IOAPIC, 0xfec00000
        .set X2APIC_SVR, 0x80f
        .set X2APIC_EOI, 0x80b
        .macro redirect pin low
        movl    $0x10 + 2 * \pin, (%rdi)
        movl    $\low, 0x10(%rdi)
        movl    $0x11 + 2 * \pin, (%rdi)
        movl    $0, 0x10(%rdi)
        .endm
        .macro gate vector handler
        lea     \handler(%rip), %rax
        mov     %ax, IDT + 16 * \vector
        movl    $0x8e000010 & 0xffff, IDT + 16 * \vector + 2
        movw    $0x8e00, IDT + 16 * \vector + 4
        shr     $16, %rax
        mov     %eax, IDT + 16 * \vector + 6
        .endm
start:  movq    $HIGH_PD + 3, 0xa000 + 8 * 3            # PDPT: the fourth GiB
        movabs  $0xfec00083, %rax
        mov     %rax, HIGH_PD + 8 * 0x1f6
        gate    0x44, edge
        gate    0x4a, level
        lidt    table(%rip)
        mov     $0x1b, %ecx
        rdmsr
        or      $0xc00, %eax
        wrmsr
        mov     $X2APIC_SVR, %ecx
        mov     $0x1ff, %eax
        xor     %edx, %edx
        wrmsr
        mov     $IOAPIC, %edi
        movl    $1, (%rdi)
        mov     0x10(%rdi), %eax
        report_eax                                      # version
        redirect 4, 0x44
        redirect 10, 0x804a
        mov     $1, %al
        report_al                                       # ready
        xor     %ebx, %ebx
again:  sti
        hlt
        cli
        cmp     $3, %ebx
        jb      again
        done
edge:   inc     %ebx
        mov     $0x44, %al
        report_al
        jmp     eoi
level:  inc     %ebx
        mov     $0x4a, %al
        report_al
eoi:    mov     $X2APIC_EOI, %ecx
        xor     %eax, %eax
        xor     %edx, %edx
        wrmsr
        iretq
table:  .word   16 * 0x50 - 1
        .quad   IDT
