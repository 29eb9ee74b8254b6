# Where nobody is: reads are all ones in every size, writes vanish.
        .code16
        .include "report.inc"
start:  xor     %eax, %eax
        mov     $HOLE, %dx
        inb     %dx, %al
        report_eax
        xor     %eax, %eax
        mov     $HOLE, %dx
        inw     %dx, %ax
        report_eax
        xor     %eax, %eax
        mov     $HOLE, %dx
        inl     %dx, %eax
        report_eax
        mov     $HOLE, %dx
        outl    %eax, %dx
        mov     $0xe000, %ax            # memory that is not there
        mov     %ax, %ds
        movl    $0, 0
        movl    0, %eax
        report_eax
        done
