"""The x86-64 machine on Linux KVM: descriptors, memory, boot data, exit loop; imports no package of ours."""
