# What the 64-bit boot protocol promises, as the first instruction finds it.
        .code64
        .include "report.inc"
start:  mov     %rsi, %rax
        report_eax                      # zero page
        mov     %rsp, %rax
        report_eax
        mov     %cs, %eax
        report_eax
        mov     %ds, %eax
        report_eax
        mov     %ss, %eax
        report_eax
        pushf
        pop     %rax
        report_eax                      # interrupts off
        mov     %cr0, %rax
        report_eax
        mov     %cr4, %rax
        report_eax
        mov     $0xc0000080, %ecx
        rdmsr
        report_eax                      # EFER
        mov     $0x10, %eax             # the descriptors are as the selectors say: load them again
        push    %rax
        lea     reload(%rip), %rax
        push    %rax
        lretq
reload: mov     $0x18, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        movq    $0x5aa5, 0x3ffffff8 - 0x3f000000
        mov     0x3ffffff8 - 0x3f000000, %rax
        report_eax                      # memory below 1 GiB is mapped to itself
        mov     $1, %eax
        cpuid
        mov     %ebx, %eax
        shr     $24, %eax
        report_eax                      # APIC id
        mov     %ecx, %eax
        shr     $31, %eax
        report_eax                      # a hypervisor
        mov     $1, %ecx
        mov     $0xb, %eax
        cpuid
        mov     %ebx, %eax
        report_eax                      # processors in the package
        push    $0
        fnstcw  (%rsp)
        pop     %rax
        report_eax                      # FPU control word
        done
