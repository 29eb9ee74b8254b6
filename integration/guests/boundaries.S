# Accesses across the end of a device's range, into another's and into a hole.
        .code16
        .include "report.inc"
start:  mov     $DEVICE + 6, %dx
        inl     %dx, %eax
        report_eax
        mov     $DEVICE + 6, %dx
        mov     $0x04030201, %eax
        outl    %eax, %dx
        mov     $OTHER + 7, %dx
        inw     %dx, %ax
        report_ax
        mov     $0xffff, %dx            # the last port has no successor
        inl     %dx, %eax
        report_eax
        done
