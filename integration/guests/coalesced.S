# Writes more bytes to the device than KVM's ring holds, reads it, writes three more, and makes no other exit.
        .code16
        .include "report.inc"
start:  mov     $DEVICE, %dx
        mov     $400, %cx
        xor     %al, %al
1:      outb    %al, %dx
        inc     %al
        loop    1b
        inb     %dx, %al
        mov     $'a', %al
        outb    %al, %dx
        outb    %al, %dx
        outb    %al, %dx
        done
