# Does what its console says: each request is an operation, a width or length, an address and a value; each
# interrupt is counted by its vector.  integration/machine/remote.py is the other end.
        .include "pc.inc"
        .set IDT, 0x10000
        .set PD, 0x11000                # of the fourth GiB, where ECAM, BARs and APICs are
        .set COUNTS, 0x12000            # 8 bytes for each vector
        .set ISR, 0x13000               # the address of an ISR status to be read at each interrupt; 0: none
        .set CAUSES, 0x13008            # what was read there
        .set PDPT, 0xa000
        .set LAPIC, 0xfee00000
        .set VECTORS, 256

start:  mov     $PD, %edi
        mov     $0xc0000000 | 0x93, %eax        # large, cache disabled, writable, present
        mov     $512, %ecx
1:      mov     %rax, (%rdi)
        add     $0x200000, %eax
        add     $8, %edi
        loop    1b
        movq    $PD | 3, PDPT + 8 * 3
        mov     %cr3, %rax
        mov     %rax, %cr3
        mov     $LAPIC, %ebp
        movl    $0x1ff, 0xf0(%rbp)      # enabled; the spurious vector is 0xff

        mov     $0xff, %al              # the PICs have every input open at reset
        outb    %al, $0x21
        outb    %al, $0xa1
        lea     stubs(%rip), %rbx
        mov     $IDT, %edi
        mov     $VECTORS, %ecx
2:      movw    %bx, (%rdi)             # a 64-bit interrupt gate for the boot code segment
        movw    $0x10, 2(%rdi)
        movw    $0x8e00, 4(%rdi)
        mov     %rbx, %rax
        shr     $16, %rax
        movw    %ax, 6(%rdi)
        movq    $0, 8(%rdi)
        add     $stub_size, %rbx
        add     $16, %edi
        loop    2b
        lidt    idtr(%rip)
        say     "ready"
        sti

next:   call    getc
        mov     %al, %r12b              # operation
        call    getq
        mov     %rax, %r13              # width in bytes, or length
        call    getq
        mov     %rax, %r14              # address
        call    getq
        mov     %rax, %r15              # value
        mov     %r14, %rdx
        cmp     $'r', %r12b
        je      read
        cmp     $'w', %r12b
        je      write
        cmp     $'i', %r12b
        je      in
        cmp     $'o', %r12b
        je      out
        cmp     $'R', %r12b
        je      dump
        cmp     $'W', %r12b
        je      fill
        poweroff

read:   xor     %eax, %eax
        cmp     $1, %r13
        je      1f
        cmp     $2, %r13
        je      2f
        cmp     $4, %r13
        je      4f
        mov     (%r14), %rax
        jmp     answer
1:      movb    (%r14), %al
        jmp     answer
2:      movw    (%r14), %ax
        jmp     answer
4:      movl    (%r14), %eax
        jmp     answer

write:  mov     %r15, %rax
        cmp     $1, %r13
        je      1f
        cmp     $2, %r13
        je      2f
        cmp     $4, %r13
        je      4f
        mov     %rax, (%r14)
        jmp     answer
1:      movb    %al, (%r14)
        jmp     answer
2:      movw    %ax, (%r14)
        jmp     answer
4:      movl    %eax, (%r14)
        jmp     answer

in:     xor     %eax, %eax
        cmp     $1, %r13
        je      1f
        cmp     $2, %r13
        je      2f
        inl     %dx, %eax
        jmp     answer
1:      inb     %dx, %al
        jmp     answer
2:      inw     %dx, %ax
        jmp     answer

out:    mov     %r15, %rax
        cmp     $1, %r13
        je      1f
        cmp     $2, %r13
        je      2f
        outl    %eax, %dx
        jmp     answer
1:      outb    %al, %dx
        jmp     answer
2:      outw    %ax, %dx
        jmp     answer

dump:   mov     (%r14), %al
        call    putc
        inc     %r14
        dec     %r13
        jnz     dump
        jmp     answer

fill:   call    getc
        mov     %al, (%r14)
        inc     %r14
        dec     %r13
        jnz     fill

answer: mov     %rax, %r15
        mov     $8, %ecx
1:      movb    %r15b, %al
        call    putc
        shr     $8, %r15
        loop    1b
        jmp     next

# A byte of the console, in al.
getc:   mov     $LSR, %dx
1:      inb     %dx, %al
        testb   $1, %al
        jz      1b
        mov     $COM1, %dx
        inb     %dx, %al
        ret

# Eight of them, the low one first, in rax.
getq:   mov     $8, %ecx
1:      call    getc
        shr     $8, %rbx
        shl     $56, %rax
        or      %rax, %rbx
        loop    1b
        mov     %rbx, %rax
        ret

        .balign 16
stubs:
        .set    vector, 0
        .rept   VECTORS
        .balign 16
        push    %rax
        mov     $vector, %eax
        jmp     interrupt
        .set    vector, vector + 1
        .endr
        .set    stub_size, 16

interrupt:
        push    %rbx
        incq    COUNTS(, %rax, 8)
        mov     ISR, %rbx
        test    %rbx, %rbx
        jz      1f
        movb    (%rbx), %bl
        orb     %bl, CAUSES
1:      cmp     $0x30, %eax
        jb      2f
        movl    $0, 0xb0(%rbp)
        jmp     3f
2:      mov     $0x20, %al              # end of interrupt, to both PICs
        outb    %al, $0xa0
        outb    %al, $0x20
3:      pop     %rbx
        pop     %rax
        iretq

idtr:   .word   16 * VECTORS - 1
        .quad   IDT
