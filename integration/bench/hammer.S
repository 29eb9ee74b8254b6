# Reads the port in %dx %ecx times, with the time stamp counter's ticks that each took at %es:0; again and again.
        .code16
        .include "report.inc"
start:  cld
        xor     %di, %di
        mov     %dx, %bp
1:      rdtsc
        mov     %eax, %esi
        mov     %bp, %dx
        inb     %dx, %al
        rdtsc
        sub     %esi, %eax
        stosl
        dec     %cx
        jnz     1b
        done
