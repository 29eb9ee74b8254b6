"""The x86-64 machine on Linux KVM: descriptors, memory, boot data, the exit loop; imports no package of ours."""
