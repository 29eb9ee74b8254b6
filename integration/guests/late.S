# Writes a byte to the device and waits, seven times.
        .code16
        .include "report.inc"
start:  mov     $7, %cx
1:      mov     $DEVICE, %dx
        mov     %cl, %al
        outb    %al, %dx
        report_al
        loop    1b
        done
