"""The x86-64 machine on Linux KVM: descriptors, memory, boot data and the exit loop; imports no other package of ours."""
