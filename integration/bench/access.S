# Makes one kind of access COUNT times, with the time stamp counter's ticks that each took at SAMPLES; again and
# again.  What the test has to say is at OP.
        .code16
        .include "report.inc"
        .set OP, 0x900          # byte: 0 in, 1 out, 2 read memory, 3 write memory, 4 read LSR and write 16 bytes
        .set COUNT, 0x902       # word
        .set PORT, 0x904        # word: port, and offset from 0xd0000
        .set SAMPLES, 0x10000

        .macro timed access:vararg
1:      rdtsc
        mov     %eax, %esi
        mov     %bx, %dx
        \access
        rdtsc
        sub     %esi, %eax
        stosl
        dec     %bp
        jnz     1b
        jmp     finish
        .endm

start:  xor     %ax, %ax
        mov     %ax, %ds
        mov     $SAMPLES >> 4, %ax
        mov     %ax, %es
        mov     $0xd000, %ax
        mov     %ax, %fs
        xor     %di, %di
        cld
        mov     COUNT, %bp
        mov     PORT, %bx
        mov     OP, %al
        cmp     $1, %al
        je      write_port
        cmp     $2, %al
        je      read_memory
        cmp     $3, %al
        je      write_memory
        cmp     $4, %al
        je      burst
        timed   inb %dx, %al
write_port:
        timed   outb %al, %dx
read_memory:
        timed   movb %fs:(%bx), %al
write_memory:
        timed   movb %al, %fs:(%bx)
burst:  timed   call line
finish: done
        jmp     start

line:   mov     $DEVICE + 5, %dx        # LSR
        inb     %dx, %al
        mov     $DEVICE, %dx            # THR
        mov     $16, %cx
        mov     $'x', %al
2:      outb    %al, %dx
        loop    2b
        ret
