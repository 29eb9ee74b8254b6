# Reads and writes 40,000 pseudo-random addresses of the 32-bit hole in 1, 2, 4 and 8 bytes, and is still there.
        .include "pc.inc"
        .set PDPT, 0xa000               # of the boot page tables
        .set PD, 0xc000
start:  say     "ready"
        mov     $PD, %edi               # guest-physical 3 to 4 GiB to itself, in 2 MiB pages
        mov     $0xc0000083, %eax
        mov     $512, %ecx
3:      mov     %rax, (%rdi)
        add     $0x200000, %rax
        add     $8, %rdi
        dec     %ecx
        jnz     3b
        movl    $PD + 3, PDPT + 24
        mov     %cr3, %rax
        mov     %rax, %cr3
        mov     $40000, %r12d
        mov     $0x2545f491, %r13d
1:      imul    $1103515245, %r13d, %r13d
        add     $12345, %r13d
        mov     %r13d, %eax
        and     $0x2fffffff, %eax       # 768 MiB
        or      $0xc0000000, %eax
        cmp     $0xd0000000, %eax       # RAM may lie below the hole
        jb      2f
        cmp     $0xfee00000, %eax       # the local APIC is not ours to scribble on
        jae     2f
        mov     %rax, %rdi
        movb    (%rdi), %al
        movw    (%rdi), %ax
        movl    (%rdi), %eax
        movq    (%rdi), %rax
        movb    %r13b, (%rdi)
        movw    %r13w, (%rdi)
        movl    %r13d, (%rdi)
        movq    %r13, (%rdi)
2:      dec     %r12d
        jnz     1b
        say     "still here"
        poweroff
