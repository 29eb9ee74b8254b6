# Counts the TSC over 50 ms of the PIT's counter 2, as Linux's pit_calibrate_tsc does, and prints it in hex.
        .include "pc.inc"
        .set LATCH, 1193182 / 20
start:  say     "ready"
        inb     $0x61, %al
        andb    $0xfd, %al              # speaker off
        orb     $1, %al                 # gate 2 up
        outb    %al, $0x61
        mov     $0xb0, %al              # counter 2, mode 0, both bytes
        outb    %al, $0x43
        mov     $LATCH & 0xff, %al
        outb    %al, $0x42
        mov     $LATCH >> 8, %al
        outb    %al, $0x42
        rdtsc
        shl     $32, %rdx
        or      %rdx, %rax
        mov     %rax, %r12
1:      inb     $0x61, %al
        testb   $0x20, %al              # OUT2
        jz      1b
        rdtsc
        shl     $32, %rdx
        or      %rdx, %rax
        sub     %r12, %rax
        mov     %rax, %r12
        say     "tsc"
        mov     $16, %r13d
2:      rol     $4, %r12
        mov     %r12d, %eax
        and     $15, %eax
        add     $'0', %al
        cmp     $'9', %al
        jbe     3f
        add     $'a' - '9' - 1, %al
3:      call    putc
        dec     %r13d
        jnz     2b
        mov     $'\n', %al
        call    putc
        poweroff
