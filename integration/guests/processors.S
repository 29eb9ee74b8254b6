# The first processor starts the second by INIT and SIPI; that one comes up in real mode and says its APIC id.
        .code64
        .include "report.inc"
        .set X2APIC_ICR, 0x830
start:  mov     $0x1b, %ecx             # IA32_APIC_BASE: x2APIC mode, so that no page needs mapping
        rdmsr
        or      $0xc00, %eax
        wrmsr
        lea     ap(%rip), %rsi
        mov     $0x3000, %edi
        mov     $ap_end - ap, %ecx
        rep movsb
        mov     $1, %edx                # to APIC id 1
        mov     $0x4500, %eax           # INIT
        mov     $X2APIC_ICR, %ecx
        wrmsr
        mov     $0x4603, %eax           # SIPI to 0x3000
        wrmsr
wait:   pause
        cmpb    $0x77, 0x4000
        jne     wait
        done
        .code16
ap:     mov     $1, %eax
        cpuid
        shr     $24, %ebx
        mov     %bl, %al
        report_al
        xor     %ax, %ax
        mov     %ax, %ds
        movb    $0x77, 0x4000
halt:   hlt
        jmp     halt
ap_end:
