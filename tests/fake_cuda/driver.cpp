// What torch asks of a CUDA driver while it differentiates, answered as if there were one device with one stream.
// `pretend()` begins it and `stop()` ends it. Works in the CPU build of torch and in the CUDA build.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

struct OneDevice : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex current_device() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  int getNumGPUs() const override { return 1; }
};

struct OneStream : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  static c10::Device device() { return {c10::DeviceType::CUDA, 0}; }
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, device()); }
  c10::Device exchangeDevice(c10::Device) const override { return device(); }
  c10::Device getDevice() const override { return device(); }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
};

OneDevice hooks;
OneStream guard;
void* own_table = nullptr;
const c10::impl::DeviceGuardImplInterface* own_guard = nullptr;

// Torch keeps its hooks for good once it has asked for them: so they keep their place, and get other functions.
void*& table_of(const at::CUDAHooksInterface& object) {
  return *reinterpret_cast<void**>(const_cast<at::CUDAHooksInterface*>(&object));
}

std::atomic<const c10::impl::DeviceGuardImplInterface*>& registered() {
  return c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)];
}

}  // namespace

extern "C" void pretend() {
  own_table = table_of(at::detail::getCUDAHooks());
  own_guard = registered().load();
  table_of(at::detail::getCUDAHooks()) = table_of(hooks);
  registered().store(&guard);
}

extern "C" void stop() {
  table_of(at::detail::getCUDAHooks()) = own_table;
  registered().store(own_guard);
}
