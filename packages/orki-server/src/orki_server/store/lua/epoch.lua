-- epoch: raises the shard's fence when somebody holds a higher one than the store knows of, which is how a store that has
-- lost its newest writes is recognised. Arguments: the fence that was seen, the first fence of the epoch after it.
-- -> raised | fine, the last fence of the store

local function lower(one, other)
  if #one ~= #other then return #one < #other end
  return one < other
end

OPS.epoch = function(a)
  local last = redis.call('GET', FENCE) or '0'
  if not lower(last, a[1]) then return { 'fine', last } end
  redis.call('SET', FENCE, a[2])
  return { 'raised', a[2] }
end
