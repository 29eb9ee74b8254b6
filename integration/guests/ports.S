# A device is written and read in every size.
        .code16
        .include "report.inc"
start:  mov     $DEVICE, %dx
        mov     $0x41, %al
        outb    %al, %dx
        mov     $DEVICE + 2, %dx
        mov     $0x4342, %ax
        outw    %ax, %dx
        mov     $DEVICE + 4, %dx
        mov     $0x47464544, %eax
        outl    %eax, %dx
        mov     $DEVICE, %dx
        inb     %dx, %al
        report_al
        mov     $DEVICE + 2, %dx
        inw     %dx, %ax
        report_ax
        mov     $DEVICE + 4, %dx
        inl     %dx, %eax
        report_eax
        done
