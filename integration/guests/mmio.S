# A device's registers in memory, in every size, and across a page, which KVM takes apart.
        .code16
        .include "report.inc"
start:  mov     $0xd000, %ax
        mov     %ax, %ds
        movb    $0x11, 0x10
        movw    $0x3322, 0x12
        movl    $0x77665544, 0x14
        movb    0x20, %al
        report_al
        movw    0x22, %ax
        report_ax
        movl    0x24, %eax
        report_eax
        movl    0xffe, %eax             # two bytes in each page
        report_eax
        movl    0xfff, %eax             # one and three
        report_eax
        done
